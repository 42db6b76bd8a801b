"""The kernel of selection: row totals, lists of opened pages, and what stands in for the others, in one pass.

Row m of the matrix tile is head ``m % HEADS_BLOCK`` of query ``m // HEADS_BLOCK % TILE_PAD`` of tile
``m // (HEADS_BLOCK * TILE_PAD)`` of the program's TILES_BLOCK tiles. Nothing of the size queries x pages is
ever written.

A row's total only grows as pages are counted into it. A page that no row would open by its total so far is
opened by none in the end: it is summarised at once. The few others are candidates, and are scored again once
totals are known.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    ENTRY,
    LN2,
    LOG2E,
    bar_at,
    closed_chunks,
    load_rows,
    of_piece,
)
from llama_surgery.attention.impl.triton.select.near_total import BOOST, near_total, rows_of_tiles
from llama_surgery.attention.impl.triton.select.page_scores import page_scores, page_terms, score_factors

#: By how much, in log2 units, a score may miss the total so far: what rounding may do to sums.
SLACK = tl.constexpr(0.01)

#: Pages whose bits are read at a time.
GATHERED = tl.constexpr(1024)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _visit(
    q, squares, means, spreads, values, total, top, rest, acc, raised, found_ptr, stream, first_page, block,
    closed, sink_page, scale, softcap,
    DIM_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK_PAGES: tl.constexpr,
    LOG2_PAGE: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Count a block of pages into the totals; summarise those that no row opens, write down the others.

    Those are bits in four words, one word for each quarter of the threads that share a row: page
    ``8·j + 2·i + p`` of the block is bit ``2·j + p`` of word i. Most of the reduction stays within a thread.

    Args:
        total, top: (rows,) sums of weights relative to ``top``, and that, BOOST below the maximum.
        rest, acc: (rows,) and (rows, values) of what is summarised, relative to ``top`` too.
        raised: (rows,) log2 of θ and learned offsets; infinite for rows that open nothing.
        closed: (rows,) closed pages, with MASK.
    """
    rows: tl.constexpr = q.shape[0]
    mean = means.load([stream, first_page + block, 0]).reshape(BLOCK_PAGES, DIM_PAD)
    spread = spreads.load([stream, first_page + block, 0]).reshape(BLOCK_PAGES, DIM_PAD)
    along, across = page_terms(q, squares, mean, spread, scale, softcap, CAP)
    scores, logits = page_scores(along, across, LOG2_PAGE)
    if MASK:
        far = (block + tl.arange(0, BLOCK_PAGES))[None, :] < closed[:, None]
        scores = tl.where(far, scores, float("-inf"))
        logits = tl.where(far, logits, float("-inf"))
    # The total before this block: a lower bar may find a page more, but is not waited for.
    bar = top + tl.log2(total) + raised
    new_top = tl.maximum(top, tl.max(logits, 1) - BOOST)
    weights = tl.exp2(logits - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    bits = 2 * tl.arange(0, BLOCK_PAGES // 8)[:, None, None] + tl.arange(0, 2)[None, None, :]
    above = tl.reshape(scores > bar[:, None], [rows, BLOCK_PAGES // 8, 4, 2])
    words = tl.reduce(tl.reduce(tl.where(above, 1 << bits[None], 0), 3, _or), 1, _or)
    words = tl.reduce(words, 0, _or)
    of_sink = sink_page - block
    here = (tl.arange(0, 4) == of_sink % 8 // 2) & (of_sink >= 0) & (of_sink < BLOCK_PAGES)
    words = tl.where(here, words | 1 << (of_sink // 8 * 2 + of_sink % 2), words)
    tl.store(found_ptr + block // BLOCK_PAGES * 4 + tl.arange(0, 4), words)
    if values is not None:
        v = values.load([stream, first_page + block, 0]).reshape(BLOCK_PAGES, VALUE_PAD)
        found = (words[None, :, None] >> bits) & 1
        weights = tl.where(found[None] != 0, 0.0, tl.reshape(weights, above.shape))
        weights = tl.reshape(weights, [rows, BLOCK_PAGES])
        rest = rest * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return total, new_top, rest, acc


@triton.jit
def _gather(found_ptr, candidates, last, BLOCK_PAGES: tl.constexpr):
    """From bits to a list: the pages below ``last`` that were found, ascending, and how many."""
    count = 0
    for first in range(0, last, GATHERED):
        page = first + tl.arange(0, GATHERED)
        word = tl.load(found_ptr + page // BLOCK_PAGES * 4 + page % 8 // 2, mask=page < last, other=0)
        found = (word >> (page % BLOCK_PAGES // 8 * 2 + page % 2)) & 1
        tl.store(candidates + count + tl.cumsum(found, 0) - 1, page, mask=found != 0)
        count += tl.sum(found, 0)
    return count


@triton.jit(
    do_not_specialize=["tiles", "capacity", "start", "stop", "near_start", "first_tile", "dense_until"]
)
def scan_kernel(
    q_ptr, near_k, means, spreads, values, features_ptr, values_ptr, sink_ptr, offset_ptr, mean_weight_ptr,
    variance_weight_ptr, summary_ptr, sink_page_ptr, found_ptr, candidates_ptr, entries_ptr, counts_ptr,
    seen_ptr, out_ptr, lse_ptr, q_chooser, q_head, q_row, feature_stream, feature_row, value_stream,
    value_row, out_chooser, out_head, out_row, lse_chooser, lse_head, tiles, capacity, pieces_ptr, start,
    stop, near_start, first_tile, dense_until, scale, softcap, log2_bar, log2_from,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr, TILE_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, LOG2_PAGE: tl.constexpr, BLOCK_NEAR: tl.constexpr, BLOCK_PAGES: tl.constexpr,
    SINK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """List the pages that tiles open, and attend to means of the others.

    A row's total is the exact near field, attention sinks, and closed pages by what they would weigh in place
    of their keys. A page is opened from the first row on in which its score exceeds the total by
    the log2 of θ, :func:`bar_at`, and by ``offset_ptr`` (choosers, HEADS) float32, if not None. Weights of
    channels are those of ``score_factors``, and ``summary_ptr`` (choosers, HEADS) float32, if not None, is
    added to a head's summaries.

    Writes, for every tile, its pages in ascending order, left-packed, as ``page * ENTRY + first_open``
    (choosers, tiles, capacity) int32; their number (choosers, tiles) int32; and how many of the tile's
    rows see each of them, summed (choosers, tiles) int32. ``capacity`` is at least the number of closed
    pages of the launch's last tile, so that a list cannot overflow. With ``values`` also what summaries come
    to, output and log-sum-exp of rows that have closed pages; other rows are left unwritten.
    Room to work in: ``found_ptr`` (choosers, programs, blocks of pages, 4) and ``candidates_ptr`` (choosers,
    programs, capacity), both int32. Grid: (programs of TILES_BLOCK tiles, choosers), GROUP choosers to a
    stream. With ``pieces_ptr`` tiles are those of a :class:`~.pieces.PieceTable`; then pages are counted
    through all pieces, and sink pages (pieces, streams) within each.
    """
    per_chunk: tl.constexpr = CHUNK // PAGE
    rows: tl.constexpr = TILES_BLOCK * TILE_PAD * HEADS_BLOCK
    chooser = tl.program_id(1)
    wide_chooser = chooser.to(tl.int64)
    stream = chooser // GROUP
    program = tl.program_id(0)
    tile = program * TILES_BLOCK
    q_first = of_piece(pieces_ptr, tile, 0, (first_tile + tile) * TILE)
    origin = of_piece(pieces_ptr, tile, 1, start)
    start = of_piece(pieces_ptr, tile, 2, start)
    stop = of_piece(pieces_ptr, tile, 3, stop)
    near_start = of_piece(pieces_ptr, tile, 4, near_start)
    first_page = of_piece(pieces_ptr, tile, 5, 0)
    head, row, position, live = rows_of_tiles(
        program, q_first, tiles, start, stop, HEADS, HEADS_BLOCK, TILES_BLOCK, TILE, TILE_PAD
    )
    closed = closed_chunks(position - row, CHUNK, WINDOW, dense_until)
    live = live & (closed > 0)
    closed = tl.where(live, closed, 0)
    most = tl.max(closed, 0)
    least = tl.min(tl.where(live, closed, most), 0)
    # The same by tile, and which of its rows are given: low … high - 1.
    by_tile = tile + tl.arange(0, TILES_BLOCK)
    begins = q_first + tl.arange(0, TILES_BLOCK) * TILE
    given = (by_tile < tiles) & (begins < stop)
    tile_pages = tl.where(given, closed_chunks(begins, CHUNK, WINDOW, dense_until), 0) * per_chunk
    low = tl.maximum(start - begins, 0)
    high = tl.minimum(stop - begins, TILE)
    opened = tl.zeros([TILES_BLOCK], tl.int32)
    seen = tl.zeros([TILES_BLOCK], tl.int32)

    if most > 0:
        local = (position - origin).to(tl.int64)
        q_offset = head.to(tl.int64) * q_head + local * q_row
        q = load_rows(q_ptr + wide_chooser * q_chooser, q_offset, 1, live, DIM, DIM_PAD, True)
        sink = position.to(tl.float32)
        if SINK:
            sink = tl.load(sink_ptr + chooser * HEADS + head, mask=head < HEADS, other=0.0)
        total, top = near_total(
            near_k, q, sink, stream, position, live, closed * CHUNK, least * CHUNK, most * CHUNK,
            q_first, near_start, scale, softcap,
            BLOCK_NEAR, DIM_PAD, SINK, CAP,
        )  # fmt: skip
        q, squares = score_factors(
            q, scale, mean_weight_ptr, variance_weight_ptr, chooser, 0, HEADS, HEADS_BLOCK, True,
            DIM, DIM_PAD,
        )  # fmt: skip
        raised = bar_at(position, log2_bar, log2_from)
        if offset_ptr is not None:
            raised += tl.load(offset_ptr + chooser * HEADS + head, mask=live, other=0.0) * LOG2E
        raised = tl.where(live, raised, float("inf"))
        piece = of_piece(pieces_ptr, tile, 6, 0)
        sink_page = tl.load(sink_page_ptr + piece * (tl.num_programs(1) // GROUP) + stream)
        candidates = candidates_ptr + (wide_chooser * tl.num_programs(0) + program) * capacity
        rest = tl.zeros([rows], tl.float32)
        acc = tl.zeros([rows, VALUE_PAD], tl.float32)
        closed *= per_chunk
        last = most * per_chunk
        words: tl.constexpr = 4
        found = (
            found_ptr + (wide_chooser * tl.num_programs(0) + program) * tl.cdiv(capacity, BLOCK_PAGES) * words
        )
        # Pages closed for every row of the block need no mask.
        common = least * per_chunk // BLOCK_PAGES * BLOCK_PAGES
        for block in range(0, common, BLOCK_PAGES):
            total, top, rest, acc = _visit(
                q, squares, means, spreads, values, total, top, rest, acc, raised - SLACK, found, stream,
                first_page, block, closed, sink_page, scale, softcap,
                DIM_PAD, VALUE_PAD, BLOCK_PAGES, LOG2_PAGE, CAP, False,
            )  # fmt: skip
        for block in range(common, last, BLOCK_PAGES):
            total, top, rest, acc = _visit(
                q, squares, means, spreads, values, total, top, rest, acc, raised - SLACK, found, stream,
                first_page, block, closed, sink_page, scale, softcap,
                DIM_PAD, VALUE_PAD, BLOCK_PAGES, LOG2_PAGE, CAP, True,
            )  # fmt: skip

        tl.debug_barrier()  # bits and candidates are written by other threads than read them
        count = _gather(found, candidates, last, BLOCK_PAGES)
        tl.debug_barrier()
        bar = top + tl.log2(total) + raised
        features = features_ptr + stream.to(tl.int64) * feature_stream
        entries = entries_ptr + (wide_chooser * tiles + by_tile.to(tl.int64)) * capacity
        for place in tl.range(0, count, BLOCK_PAGES, num_stages=1):
            at = place + tl.arange(0, BLOCK_PAGES)
            present = at < count
            page = tl.load(candidates + at, mask=present, other=0)
            mean = load_rows(features, first_page + page, feature_row, present, DIM, DIM_PAD, True)
            spread = load_rows(features + DIM, first_page + page, feature_row, present, DIM, DIM_PAD, True)
            along, across = page_terms(q, squares, mean, spread, scale, softcap, CAP)
            scores, logits = page_scores(along, across, LOG2_PAGE)
            far = present[None, :] & (page[None, :] < closed[:, None])
            first = tl.where((scores > bar[:, None]) & far, row[:, None], TILE)
            first = tl.min(tl.reshape(first, [TILES_BLOCK, TILE_PAD * HEADS_BLOCK, BLOCK_PAGES]), 1)
            first = tl.where((page == sink_page)[None, :], 0, first)
            listed = (first < TILE) & present[None, :] & (page[None, :] < tile_pages[:, None])
            rank = opened[:, None] + tl.cumsum(listed.to(tl.int32), 1) - 1
            tl.store(entries[:, None] + rank, (first_page + page)[None, :] * ENTRY + first, mask=listed)
            opened += tl.sum(listed.to(tl.int32), 1)
            rows_seen = tl.maximum(high[:, None] - tl.maximum(first, low[:, None]), 0)
            seen += tl.sum(tl.where(listed, rows_seen, 0), 1)
            if values is not None:
                v = load_rows(
                    values_ptr + stream.to(tl.int64) * value_stream, first_page + page, value_row, present,
                    VALUE_DIM, VALUE_PAD, True,
                )  # fmt: skip
                by_row = tl.broadcast_to(
                    first[:, None, :], [TILES_BLOCK, TILE_PAD * HEADS_BLOCK, BLOCK_PAGES]
                )
                hidden = far & (row[:, None] < tl.reshape(by_row, [rows, BLOCK_PAGES]))
                weights = tl.where(hidden, tl.exp2(logits - top[:, None]), 0.0)
                rest += tl.sum(weights, 1)
                acc = tl.dot(weights.to(v.dtype), v, acc)

        if values is not None:
            column = tl.arange(0, VALUE_PAD)
            lse = tl.where(rest > 0.0, (top + tl.log2(rest)) * LN2, float("-inf"))
            if summary_ptr is not None:
                lse += tl.load(summary_ptr + chooser * HEADS + head, mask=live, other=0.0)
            tl.store(
                lse_ptr + wide_chooser * lse_chooser + head.to(tl.int64) * lse_head + local, lse, mask=live
            )
            out = acc / tl.where(rest > 0.0, rest, 1.0)[:, None]
            out_offset = wide_chooser * out_chooser + head.to(tl.int64) * out_head + local * out_row
            cells = out_ptr + out_offset[:, None] + column[None, :]
            keep = live[:, None] & (column < VALUE_DIM)[None, :]
            tl.store(cells, out.to(out_ptr.dtype.element_ty), mask=keep)

    cell = wide_chooser * tiles + by_tile
    tl.store(counts_ptr + cell, opened, mask=by_tile < tiles)
    tl.store(seen_ptr + cell, seen, mask=by_tile < tiles)

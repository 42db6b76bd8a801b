"""What the operated layers of an engine read, through the engine's logging."""

from vllm import envs
from vllm.logger import init_logger

from llama_surgery.serving.counting import EngineCounters

logger = init_logger("vllm.llama_surgery")


def report(engine: EngineCounters) -> None:
    """Log one line about all layers, at the engine's own interval and only if there is anything to say."""
    read = engine.take(envs.VLLM_LOG_STATS_INTERVAL)
    if read is not None:
        logger.info("llama-surgery: %s", read)

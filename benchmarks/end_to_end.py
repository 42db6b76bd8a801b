"""Time to first token and decode step of a whole model, dense and operated: see ``--help``."""

from llama_surgery.bench.end_to_end import main

if __name__ == "__main__":
    main()

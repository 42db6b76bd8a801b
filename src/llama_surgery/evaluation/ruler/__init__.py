"""RULER: thirteen synthetic tasks of retrieval, tracing, counting and reading, at any length.

After Hsieh et al. (2024), "RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv:2404.06654. Generators and wordings are this package's own, so scores compare models with each other
here, not with published tables.
"""

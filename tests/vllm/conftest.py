"""Real vLLM servers: opt-in, by `make test-vllm`, which names the Python that has vLLM."""

import os

collect_ignore_glob = [] if os.environ.get("BATON_VLLM_PYTHON") else ["test_*.py"]

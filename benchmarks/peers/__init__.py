"""Our runtime beside llama.cpp, OpenVINO, ONNX Runtime GenAI and transformers, on the same weights.

    python -m vlm_edge.benchmarks.peers setup FOLDER      # one environment a peer, once
    python -m vlm_edge.benchmarks.peers run FOLDER --model smollm2

docs/performance.md has the tables and how to read them.
"""

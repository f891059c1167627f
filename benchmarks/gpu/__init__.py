"""The one script for a machine with a GPU for ten minutes: speed, memory and resuming at the paper's shapes.

    python -m benchmarks.gpu [--output FOLDER] [--sections 1 3 4] [--budget SECONDS]
    python -m benchmarks.gpu --dry-run            # every section at tiny sizes on a CPU

Weights are random. No video, simulator, hub or network is used. The sections come in order of importance, and each writes its
JSON file at once:

1. peak        a bfloat16 product and a copy
2. video_dit   our video DiT beside diffusers' stock forward: equality and speed
3. answer      a policy's answer: stock, plain, fast, compiled as CUDA graphs, with `pool_future` 2; batch 1 and 8
4. step        adapt, joint and finetune steps: eager, compiled, stock, three fractions of activation checkpointing, memory
5. frozen      Wan VAE, DINOv2-B and the 7B text encoder
6. resume      20 joint steps with validation, SIGKILL, resume, compare; then serve and diagnose the checkpoint
7. tiny        steps per second of `tiny`, plain and as a CUDA graph
8. fsdp        FSDP2 over NCCL on all GPUs of the machine

A section or figure that does not fit in the rest of the budget is skipped by name, and so is one whose package is missing. The
last output is a Markdown table, also in FOLDER/table.md. Beside each time stands its floor: the longer of its FLOPs over the
measured peak and its bytes over the measured bandwidth.

The script needs torch 2.11 or newer, transformers, diffusers, safetensors, accelerate, cattrs, tyro, jaxtyping and rich. Serving
in section 6 needs msgpack, websockets, prometheus-client and pyzmq, and its diagnosis scikit-learn, scikit-image, scipy and
pillow. For a machine without a network, download the missing wheels where there is one, for that machine's Python:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 -d wheels \\
        diffusers==0.42.1 cattrs tyro docstring_parser typeguard importlib_metadata zipp websockets pyzmq

then copy the repository with `wheels`, and there:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site:src:. python3 -m benchmarks.gpu --output gpu
"""

"""`python -m mini_vllm` is the same as the `mini-vllm` command."""

from mini_vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

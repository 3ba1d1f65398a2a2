"""What looks at the kernels without running them: `python -m smattn.kernels.tools.aot`."""

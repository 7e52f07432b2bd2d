"""Publishing: ONNX, GGUF, model card, Hub."""

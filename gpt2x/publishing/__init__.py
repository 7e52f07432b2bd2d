"""From a trained model to those who use it: ONNX, GGUF, gpt2x's own form, model cards, the Hub.

The modules are imported one by one, since each brings a library that the others do without:
`gpt2x.publishing.onnx_decoder` runs where neither torch nor transformers is installed.
"""

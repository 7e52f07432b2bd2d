"""What a model is worth: validation on held-out documents, samples, conversations, HellaSwag, lm-eval."""

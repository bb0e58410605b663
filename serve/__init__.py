"""The HTTP endpoint: embeddings, fine-tuning and predictions from a release."""

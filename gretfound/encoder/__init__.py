"""Encoders: vision transformers, their objectives, preprocessing and folders."""

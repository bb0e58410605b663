"""Generators: latent diffusion pipelines that draw a site's colour fundus photographs."""

"""Global RETFound on Ray: many hospitals' generators and photographs become one retinal foundation model."""

__version__ = "0.1.0"

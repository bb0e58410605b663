"""The privacy gate gate/1: what a generator must show before anything that it learned leaves a site."""

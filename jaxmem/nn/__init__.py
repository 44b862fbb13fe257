"""Small NNX layers that mixers and backbones share."""

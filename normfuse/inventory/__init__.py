"""The norms, softmaxes and attentions of a model, counted once each however they are spelt."""

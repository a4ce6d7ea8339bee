"""What the suites share: servers, and a model whose every word is known in advance."""

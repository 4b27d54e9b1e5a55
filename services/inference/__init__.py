"""The inference service. Other services call it through its RPCs and import nothing of it."""

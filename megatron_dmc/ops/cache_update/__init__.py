"""The compressed cache, token by token: append or accumulate."""

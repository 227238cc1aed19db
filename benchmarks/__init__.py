"""What a training step costs, here and elsewhere: the same network, data, batch and optimizer, side by side."""

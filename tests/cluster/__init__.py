"""Several nodes, simulated on this machine: real Ray daemons on loopback."""

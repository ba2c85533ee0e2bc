"""What several folders of tests and benchmarks share: peers, wires, fakes of what a machine shows, and waiting."""

"""What deploy/ holds, tried with the tools that read it. A package, so that its tests find the fixtures of tests/service."""

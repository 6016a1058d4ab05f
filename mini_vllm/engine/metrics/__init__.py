"""What is counted of each step and each request, and where it goes: Prometheus, the log, OpenTelemetry."""

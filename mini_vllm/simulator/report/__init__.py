"""A folder that says what a simulation found: a page to read, pictures, and every number behind them as files."""

from mini_vllm.simulator.report.folder import Question, write_capacity_report, write_report, write_sweep_report

__all__ = ["Question", "write_capacity_report", "write_report", "write_sweep_report"]

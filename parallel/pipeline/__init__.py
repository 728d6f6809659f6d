"""Pipeline parallelism: schedules as data, a simulator and an engine that runs them."""

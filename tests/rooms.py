"""The rooms of the package, and the directions of their imports: docs/architecture.md states the same table."""

# Which rooms a room may import from, beside itself. The core is what lies in the root but the two modules below.
ROOMS = {
    "core": set(),
    "pipeline": {"core"},
    "registration": {"core", "pipeline"},
    "data": {"core"},
    "evaluation": {"core"},
    "training": {"core", "data", "evaluation"},
    "sharing": {"core", "data", "evaluation", "training"},
    "conversion": {"core", "pipeline"},
    "commands": {"core", "pipeline", "data", "evaluation", "training", "sharing", "conversion"},
}

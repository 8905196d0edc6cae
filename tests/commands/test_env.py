"""The command `env`: the versions that a bug report needs."""

from tests.running import run_command


def test_env_prints_the_versions_for_a_bug_report():
    done = run_command("env", new_process=True)
    assert done.returncode == 0, done.stderr
    for name in ("diffusers_vdm", "torch", "diffusers", "Python", "CPU", "CUDA"):
        assert f"\n  {name}" in f"\n{done.stdout}"

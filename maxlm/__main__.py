from maxlm.cli import run

run()

# make demo | test | bench | bench-NAME | gate-power | lint | site-image | setup; each sets up what it needs.
SHELL := /bin/bash
HUB ?= runs/demo
SITES ?=
EVAL ?=
PYTHON_IN := $(CURDIR)/.venv/bin
export PATH := $(PYTHON_IN):$(PATH)
# Two test processes on one Ray, each file's tests in one of them and in order, long files not left for the end.
SIDE_BY_SIDE ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# No compiled kernel is looked up at the hub, and no cloud metadata server waited for.
export HF_HUB_OFFLINE ?= 1
export AWS_EC2_METADATA_DISABLED ?= true

.PHONY: setup demo test test-slow test-long bench gate-power lint site-image

setup:
	@.ci/environment

demo: setup
	python -m jobs.demo $(if $(SITES),conf/demo/real.yaml sites="$(SITES)") $(if $(EVAL),evaluation="$(EVAL)") hub_uri=$(HUB)

test: setup
	python -m pytest -m "not slow and not long" $(SIDE_BY_SIDE)

test-slow: setup
	python -m pytest -m slow $(SIDE_BY_SIDE)

test-long: setup
	python -m pytest -m long

bench: setup
	python -m tests.bench

bench-%: setup
	python -m tests.bench $*

gate-power: setup
	python -m tests.gate_power

lint: setup
	ruff format --check .
	ruff check .
	mypy

site-image: export TAG ?= 0.1.0
site-image: setup
	cluster/site-image
	cluster/try-site-image localhost/gretfound-site:$(TAG)

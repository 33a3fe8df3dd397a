# `make dev` and `make test` are all it takes on a bare machine with Rust: each sets up what is missing.

.PHONY: dev test compare setup tools

# A broker on 127.0.0.1:50051 with a real, throw-away PostgreSQL behind it.
dev: setup
	cargo run --locked --quiet -- dev

# All tests. They start their own PostgreSQL.
test: setup tools
	cargo test --locked

# What a transaction costs through the broker, PgBouncer, tokio-postgres and FastAPI: tables, JSON and a plot in
# target/compare, within four minutes.
compare: setup
	cargo bench --locked --bench compare -- --quick

# Installs what is missing with the system's package manager: a C linker, PostgreSQL's server and psql, Python 3 with venv.
setup:
	@command -v cargo >/dev/null || { echo 'Rust is missing: install it from https://rustup.rs, then run make again'; exit 1; }
	@if command -v cc >/dev/null && command -v psql >/dev/null \
	    && { [ -n "$$PG_BIN" ] || command -v initdb >/dev/null \
	        || ls /usr/lib/postgresql/*/bin/initdb /opt/homebrew/opt/postgresql*/bin/initdb 2>/dev/null | grep -q .; } \
	    && python3 -c 'import ensurepip, venv' 2>/dev/null; then exit 0; fi; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	if command -v apt-get >/dev/null; then \
	    $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	        gcc libc6-dev postgresql postgresql-client python3 python3-venv; \
	elif command -v dnf >/dev/null; then $$sudo dnf install -y gcc postgresql-server postgresql python3; \
	elif command -v brew >/dev/null; then brew install postgresql python3; \
	else echo 'Install a C compiler, PostgreSQL with its server, and Python 3 with venv, then run make again'; exit 1; fi

# Installs what only tests need: Chromium and its driver, in which the console is tested, and Prometheus.
tools: setup
	@if command -v chromedriver >/dev/null && command -v prometheus >/dev/null; then exit 0; fi; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	if command -v apt-get >/dev/null; then \
	    $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq chromium chromium-driver prometheus; \
	elif command -v dnf >/dev/null; then $$sudo dnf install -y chromium chromedriver golang-github-prometheus; \
	elif command -v brew >/dev/null; then brew install --cask chromium chromedriver && brew install prometheus; \
	else echo 'Install Chromium or Chrome, chromedriver and prometheus, then run make again'; exit 1; fi

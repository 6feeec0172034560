# SPDX-License-Identifier: Apache-2.0
import pathlib

import requests
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from conftest import ROOT
from jupyter import Jupyter


def test_a_kernel_executes_a_cell(lab):
    jupyter = Jupyter(lab)
    kernel = jupyter.start_kernel()
    assert jupyter.execute(kernel, "6*7") == "42"
    jupyter.request("DELETE", f"/api/kernels/{kernel}")


def test_without_the_token_there_is_no_way_in(lab):
    assert requests.get(f"http://{lab['address']}:8888/api/kernels", timeout=10).status_code == 403
    assert requests.get(f"http://{lab['address']}:8888/api", timeout=10).status_code == 200


def test_a_terminal_runs_id(lab):
    assert "uid=1000(analyst) gid=1000(analyst)" in Jupyter(lab).terminal("id", "gid=1000(analyst)")


def test_the_terminal_has_what_an_analyst_expects(agent, lab):
    agent.exec("lab", "sh", "-c", "git --version && cc --version && make --version && curl --version && pip --version && nano --version")


def test_the_token_is_a_file_and_nowhere_else(agent, lab):
    token = lab["token"]
    assert len(token) == 48
    seen = agent.exec("lab", "sh", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'").stdout
    assert "JUPYTER_TOKEN_FILE" in seen and token not in seen
    assert agent.exec("lab", "cat", "/run/carrel/credentials/token").stdout == token
    for path in pathlib.Path(agent.directory).rglob("*"):
        if path.is_file() and "/images/" not in str(path) and "/homes/" not in str(path):
            assert token.encode() not in path.read_bytes(), path


def test_a_file_in_home_is_there_after_a_new_launch(agent):
    agent.launch("jupyterlab.yaml", "keep")
    jupyter = Jupyter(agent.json("get", "keep"))
    jupyter.request("PUT", "/api/contents/work.txt", json={"type": "file", "format": "text", "content": "kept"})
    agent.exec("keep", "sh", "-c", "echo gone > /tmp/scratch")
    agent.remove("keep")
    owner = (agent.directory / "homes/ada/work.txt").stat()
    assert (owner.st_uid, owner.st_gid) == (2001, 2001), "on disk it is the owner's"
    agent.launch("jupyterlab.yaml", "keep")
    assert agent.exec("keep", "cat", "work.txt").stdout == "kept"
    assert agent.exec("keep", "cat", "/tmp/scratch", check=False).returncode == 1
    agent.remove("keep")


def test_r_answers_in_its_kernel(agent):
    agent.launch("r-jupyterlab.yaml", "r-lab")
    jupyter = Jupyter(agent.json("get", "r-lab"))
    kernel = jupyter.start_kernel("ir")
    assert jupyter.execute(kernel, "6*7").strip() == "[1] 42"
    assert "R version" in jupyter.execute(kernel, "cat(R.version.string)")
    agent.remove("r-lab")


def run_cell(browser):
    """Presses Shift+Enter in the first cell, unless it has run. Returns whether it has."""
    if any("browser 42" in e.text for e in browser.find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output")):
        return True
    # The windowed notebook keeps hidden twins of its cells for measuring.
    cells = [e for e in browser.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell .cm-content") if e.is_displayed()]
    if cells:
        ActionChains(browser).click(cells[0]).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    return False


def test_a_browser_runs_a_notebook_cell(lab):
    Jupyter(lab).request("PUT", "/api/contents/browser.ipynb", json={"type": "notebook", "content": {
        "cells": [{"cell_type": "code", "source": "print('browser', 6*7)", "metadata": {}, "outputs": [], "execution_count": None, "id": "a"}],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}})
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,900"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        browser.get(lab["url"].replace("/lab?", "/lab/tree/browser.ipynb?"))
        # JupyterLab draws its cells anew while it loads.
        wait = WebDriverWait(browser, 90, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-Notebook-ExecutionIndicator[data-status=idle]"))
        # JupyterLab loses keys that arrive while it redraws a cell: they are sent again until there is output.
        wait = WebDriverWait(browser, 90, poll_frequency=5, ignored_exceptions=[StaleElementReferenceException])
        wait.until(run_cell)
        (ROOT / ".cache" / "artefacts").mkdir(exist_ok=True)
        browser.save_screenshot(str(ROOT / ".cache" / "artefacts" / "jupyterlab.png"))
    finally:
        browser.quit()

"""page.py: the page in a real headless Chromium, and what it draws for every kind of labels.

Keeps a screenshot in runs/test_page.png.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_explore import lively_decoder, pixels, save_network

import gan
import latents

LIMIT = 15.0  # seconds from a click to the new picture: on a busy machine; on an idle one it is well below one
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


def wait_for(what, seconds: float = 30.0):
    """The first true value that `what()` gives, and how long that took."""
    start = time.monotonic()
    while not (value := what()):
        assert time.monotonic() - start < seconds, "nothing happened"
        time.sleep(0.1)  # each question takes the browser's time as well
    return value, time.monotonic() - start


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`explore.py serve` on a network of 64 px with three classes, one dimension of which has a name."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")
    network = save_network(folder / "gan.pt", lively_decoder(64, 3), ["cat", "dog", "wild"], "one-hot")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "explore.py", "serve", "--network", network, "--port", str(port)]
    command += ["--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            log_of = (folder / "log").read_text
            wait_for(lambda: "Ctrl-C" in log_of() or process.poll() is not None, 60)
            assert process.poll() is None, log_of()
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, network=network, folder=folder, log=log_of)
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def browser(server):
    """A headless Chromium at the page."""
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in [*FLAGS.split(), "--window-size=1400,1000"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(server.folder / "downloads")})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    try:
        driver.get(server.url)
        wait_for(lambda: picture(driver))
        yield driver
    finally:
        driver.quit()


def picture(driver) -> str | None:
    """Where the shown picture comes from, once it is loaded."""
    images = driver.find_elements("css selector", "#picture img")
    whole = images and driver.execute_script("return arguments[0].complete && arguments[0].naturalWidth", images[0])
    return images[0].get_attribute("src") if whole else None


def changed_by(driver, action) -> float:
    """Seconds from an action to another picture."""
    before = picture(driver)
    action()
    return wait_for(lambda: picture(driver) not in (before, None))[1]


@pytest.mark.long
def test_controls_change_the_picture_within_a_second(browser):
    from selenium.webdriver.common.keys import Keys

    labels = browser.find_elements("css selector", "#labels input")
    sliders = browser.find_elements("css selector", "input[type=range]")
    assert len(labels) == 3 and sliders[1].get_attribute("aria-label").startswith("range slider for layer")
    seconds = {
        "class": changed_by(browser, labels[1].click),
        "slider": changed_by(browser, lambda: sliders[1].send_keys(Keys.ARROW_RIGHT * 40)),
        "truncation": changed_by(browser, lambda: sliders[0].send_keys(Keys.ARROW_LEFT * 5)),
        "new eps": changed_by(browser, browser.find_element("id", "new").click),
    }
    assert max(seconds.values()) < LIMIT, seconds
    seed = browser.find_element("css selector", "#seed input").get_attribute("value")
    assert int(seed) > 0


@pytest.mark.long
def test_keyboard_reaches_every_control(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    controls = "#labels input, #seed input, #new, input[type=range], #save-picture, #save-latent, #more"
    wanted = {e.id for e in browser.find_elements("css selector", controls)}
    browser.execute_script("document.activeElement.blur()")
    reached = set()
    for _ in range(200):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.add(browser.switch_to.active_element.id)
        if wanted <= reached:
            break
    assert wanted <= reached
    other = browser.find_elements("css selector", "#labels input:not(:checked)")[0]
    assert changed_by(browser, lambda: other.send_keys(Keys.SPACE)) < LIMIT


@pytest.mark.long
def test_downloads_are_what_is_shown(browser, server, command):
    folder = server.folder / "downloads"
    for name in ("picture.png", "latent.json"):
        browser.find_element("id", f"save-{name.partition('.')[0]}").click()
        wait_for((folder / name).exists)
    with Image.open(folder / "picture.png") as image:
        assert image.size == (64, 64) and {"network", "y", "seed"} <= image.text.keys()
    out = server.folder / "again.png"
    command("explore", "sample", "--network", server.network, "--latent", folder / "latent.json", "--out", out)
    assert np.array_equal(pixels(out)[-64:, -64:], pixels(folder / "picture.png"))


@pytest.mark.long
def test_sixteen(browser):
    browser.find_element("id", "more").click()
    (image,), _ = wait_for(lambda: browser.find_elements("css selector", "#batch img"))
    wait_for(lambda: browser.execute_script("return arguments[0].naturalWidth", image) == 4 * 64)
    (ROOT / "runs").mkdir(exist_ok=True)
    assert browser.save_screenshot(str(ROOT / "runs" / "test_page.png"))


@pytest.mark.long
def test_no_errors_and_nothing_from_elsewhere(browser, server):
    """Runs last: of all that happened before."""
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(sent) > 20 and not [url for url in sent if not url.startswith((server.url, "data:", "blob:"))]
    assert "Traceback" not in server.log()
    assert f"http://127.0.0.1:{server.port} shows" in server.log()


@pytest.mark.long
def test_only_this_machine_is_let_in(server):
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), 2).close()


def test_a_taken_port_is_one_line(server, command):
    line = command("explore", "serve", "--network", server.network, "--port", server.port, code=1).output
    assert line.splitlines()[-1].startswith("Error: ") and f"--port {server.port}" in line


def test_without_gradio_one_line(command, server, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "page", raising=False)
    assert "pip install gradio" in command("explore", "serve", "--network", server.network, code=1).output


@pytest.mark.parametrize("kind", ["multi-label", "none"])
def test_pages_of_other_labels(kind, tmp_path):
    page = pytest.importorskip("page", exc_type=ImportError)

    names = ["Hat", "Tie"] if kind == "multi-label" else []
    file = save_network(tmp_path / "gan.pt", lively_decoder(32, len(names)), names, kind)
    network = gan.load(file)
    entry = dict(layer=2, dim=3, name="Hat +1.2", change=0.1)
    (tmp_path / "dimensions.json").write_text(
        json.dumps({"network": latents.notes_of(network)["network"], "dimensions": [entry, entry | {"change": 0}]})
    )
    blocks = page.build(network, file, tmp_path)
    components = [c for c in blocks.blocks.values() if getattr(c, "label", None)]
    sliders = [c.label for c in components if "layer" in c.label]
    assert sliders == ["layer 2, dim 3: Hat +1.2"]  # a dimension that changes nothing has none
    draw = blocks.fns[0].fn
    pictures = []
    for chosen, seed, z in ((["Hat"], 0, 1.0), ([], 0, 1.0), (["Hat"], 1, 1.0), (["Hat"], 0, 2.0)):
        _, shown, latent = draw(SimpleNamespace(session_hash="../x"), chosen if names else None, seed, 1.0, z)
        pictures.append(pixels(shown))
        y, code = latents.read_json(network, latent)
        assert code[0, latents.column(2, 3)] == z
        assert y is None if kind == "none" else y[0].tolist() == [float("Hat" in chosen), 0]
    same = [np.array_equal(pictures[0], other) for other in pictures[1:]]
    assert same == [kind == "none", False, False]

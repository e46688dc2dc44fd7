"The package as settings.ini describes it; nothing beyond setuptools and the standard library is needed to read this."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
name = cfg["lib_name"]

setup(
    name=name,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=[name],
    package_data={name: ["*.js", "weights/*.safetensors", "weights/*.md", "published/*.csv", "templates/*"]},
    include_package_data=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("cpu", "gpu", "onnx", "dev")},
    entry_points={"console_scripts": cfg["console_scripts"].splitlines()},
)

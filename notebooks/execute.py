"""Runs notebooks, and keeps them with their outputs beside their scripts.

  python -m notebooks.execute               all of them
  python -m notebooks.execute 01_routing_by_hand

NAME.py is what is edited, and NAME.ipynb is made of it here. This needs the extra
notebooks, and takes a few minutes for each.
"""

import base64
import io
import pathlib
import sys
import time

FOLDER = pathlib.Path(__file__).resolve().parent
_PNG = "image/png"


def main(names) -> int:
  """The command."""
  for script in sorted(FOLDER.glob("[0-9]*.py")):
    if script.stem in names or not names:
      started = time.monotonic()
      execute(script)
      print(f"{script.stem}: {time.monotonic() - started:.0f} s", flush=True)
  return 0


def execute(script: pathlib.Path) -> None:
  """Runs a notebook in a kernel of its own, and writes NAME.ipynb."""
  import jupytext
  import nbclient
  import nbformat

  notebook = jupytext.read(script)
  for number, cell in enumerate(notebook.cells):
    cell.id = f"cell-{number:02d}"  # Equal notebooks are equal files.
  place = {"metadata": {"path": str(FOLDER)}}
  options = {"timeout": None, "record_timing": False, "coalesce_streams": True}
  nbclient.NotebookClient(notebook, resources=place, **options).execute()
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      if _PNG in output.get("data", {}):
        output.data[_PNG] = smaller(output.data[_PNG])
  nbformat.write(notebook, script.with_suffix(".ipynb"))


def smaller(png: str) -> str:
  """A picture in base64 with a palette of 256 colours, a third of the bytes."""
  from PIL import Image

  picture, made = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
  picture.convert("RGB").quantize(256).save(made, "png", optimize=True)
  return base64.b64encode(made.getvalue()).decode()


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

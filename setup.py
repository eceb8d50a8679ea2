"""The build step that setup.cfg cannot express; everything else is in setup.cfg."""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class CleanBuild(build_py):
    """Deletes the output of earlier builds: setuptools packs all of it, also deleted modules."""

    def run(self):
        """Builds from an empty folder."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build_py": CleanBuild})

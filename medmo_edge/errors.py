"""Every error a user can cause, in one tree. Anything else that escapes is a bug.

    MedmoError
      |- UsageError           an argument that cannot work (wrong value, missing extra)
      |- CheckpointError      a checkpoint folder that is not what it should be
      |- RecipeError          a training recipe
      |- SampleError          a labelled sample or the image / annotation behind it
      |- CalibrationError     a calibration record or importance matrix
      |- ExportError          an export that cannot be done
      |- ArtifactError        an exported folder that is incomplete, changed or damaged
      |- ImageError           a picture or DICOM file that cannot be shown to the model
      |- PromptError          a question that cannot be asked as it is
      |- BackendUnavailable   no backend can run the artifact here
      |- GenerationError      a running answer that could not go on
      |- ResultError          an answer that cannot be written as a DICOM or FHIR result
      |- NodeError            a DICOM node's rules, queue or peers

The message is one line that says what is wrong, where, and what to do. The command line prints it
and exits with code 2.
"""

from collections.abc import Mapping


def one_line(error: BaseException, limit: int = 200, *, named: bool = False) -> str:
    """What another library said, on one line of ``limit`` characters; ``named`` with its class."""
    text = f"{type(error).__name__}: {error}" if named else str(error)
    return " ".join(text.split())[:limit]


class MedmoError(Exception):
    """Base of all errors that a user can cause; ``str(error)`` is one line."""


class UsageError(MedmoError):
    """An argument or option that cannot work as given."""


class CheckpointError(MedmoError):
    """A checkpoint folder that is missing, incomplete or of another architecture."""


class RecipeError(MedmoError):
    """A training recipe with unknown keys or impossible values."""


class SampleError(MedmoError):
    """A labelled sample that cannot be read or rendered."""


class CalibrationError(MedmoError):
    """A calibration record or importance matrix that does not fit its checkpoint."""


class ExportError(MedmoError):
    """An export that cannot be carried out."""


class ArtifactError(MedmoError):
    """An artifact folder without manifest, with changed files or with a damaged graph."""


class ImageError(MedmoError):
    """A picture or DICOM file that cannot be turned into a frame."""


class PromptError(MedmoError):
    """A question or conversation that the chat template cannot carry safely."""


class GenerationError(MedmoError):
    """An answer that could not be finished, e.g. because the context is full."""


class ResultError(MedmoError):
    """An answer that cannot be written as a result object, or not to that place."""


class NodeError(MedmoError):
    """A DICOM node whose rules, queue or destinations cannot work as given."""


class BackendUnavailable(MedmoError):
    """No backend can run here; ``reasons`` maps each backend's name to why not."""

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons: dict[str, str] = dict(reasons or {})
        details = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
        super().__init__(f"{message} ({details})" if details else message)

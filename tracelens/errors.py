"""Every mistake has its own exception; all of them are here, those of some parts from files of their own.

An error says what is wrong, where the user wrote it (file, line, source text), what the graph around it looks like
where that helps, and what to write instead. ``docs/errors.md`` has one entry per class.
"""

from __future__ import annotations

from tracelens.lens_errors import *  # noqa: F403  # all of its __all__
from tracelens.naming_errors import *  # noqa: F403  # as above
from tracelens.steering_errors import *  # noqa: F403  # as above
from tracelens.tracelens_error import Blaming as Blaming
from tracelens.tracelens_error import TracelensError

# --- opening and closing a trace ---------------------------------------------------------------------------------


class NoTraceError(TracelensError):
    """A site was used while no trace of its model was open."""


class NestedTraceError(TracelensError):
    """A trace was opened inside another trace of the same model."""


class NothingSavedError(TracelensError):
    """The block writes to the model but saves nothing, so it could have no visible effect."""


class LostUpdateError(TracelensError):
    """``h += v`` on a value read from a site was never handed back to that site."""


class BlockEndedError(TracelensError):
    """Something was to be recorded after its block had ended."""


class ForeignValueError(TracelensError):
    """A value of another trace, not saved there, was used in this one."""


class DuplicateNameError(TracelensError):
    """Two saves, or two constants, of one trace were given the same name."""


# --- modules -----------------------------------------------------------------------------------------------------


class ModuleCallError(TracelensError):
    """A forward pass does not call the module, or calls it several times and it was not said which call is meant."""


class ModuleTensorError(TracelensError):
    """A module receives or returns no such tensor, or several and it was not said which is meant."""


class ReplacementError(TracelensError):
    """The module cannot be left out, or what was named is not the output of a module."""


class SkippedSiteError(TracelensError):
    """The site is made by a module that the block does not run, so there is nothing there."""


class MetaForwardError(TracelensError):
    """What the model's modules receive and return cannot be learned without running the model."""


class SeveralDevicesError(TracelensError):
    """The model lies on several devices that nothing connects."""


class LayoutError(TracelensError):
    """A model cannot be spread over that many ranks, or is spread in a way of which nothing is known."""


class ElsewhereError(TracelensError):
    """A result was read on a rank that does not have it."""


class PipelineError(TracelensError):
    """Something cannot be done on a model that is cut into the stages of a pipeline."""


class PlansDifferError(TracelensError):
    """The ranks of one model were about to do different things, and would have waited for each other for ever."""


class MetaTensorError(TracelensError):
    """A tensor without data would be computed with: PyTorch may give numbers out of nowhere, and no error."""


class PackedWeightError(TracelensError):
    """A quantised or adapted matrix was asked for, and the module that multiplies by it does not give it."""


class ModelMovedError(TracelensError):
    """A compiled program was made for other devices than those that the model is on now."""


class UnknownArchitectureError(TracelensError):
    """The model is not as the table of its family says, or is no module at all."""


class FamilyTableError(TracelensError):
    """A table of a family of models does not say of every site where it is, or says it of what is no site."""


class FamilyKnownError(TracelensError):
    """A table was registered for a type of models that has one already."""


class FamilyImportError(TracelensError, ImportError):
    """A table of a family of models was named that cannot be imported, or is none."""


class AttentionImplementationError(TracelensError):
    """The model computes attention in a way whose inside cannot be reached."""


class NotALanguageModelError(TracelensError, AttributeError):
    """Layers, sites, prompts and tokens are there for language models with a table of sites, and this is none."""


class OptionError(TracelensError, ValueError):
    """An option was given something that it does not take."""


# --- using values ------------------------------------------------------------------------------------------------


class ShapeError(TracelensError):
    """The shapes do not fit."""


class DtypeError(TracelensError, TypeError):
    """The dtypes do not fit."""


class StaleValueError(TracelensError):
    """A value was used after a write through it, or written through after its site had been written."""


class WriteTargetError(TracelensError):
    """The thing assigned to is not a site, or a site that cannot be written."""


class CausalityError(TracelensError):
    """A value would have to travel backwards in the forward pass."""


class SharedHeadError(TracelensError):
    """A key or value head serves several query heads, so it cannot be changed for one of them alone."""


class ExpertChoiceError(TracelensError):
    """What was written to a router leaves a token without its experts: too few, one of them twice, or none there is."""


class ValueBranchError(TracelensError, TypeError):
    """Python asked a value for a number or a truth that does not exist before the run."""


class ValueAttributeError(TracelensError, AttributeError):
    """Values have no such attribute."""


class InPlaceError(TracelensError):
    """An in-place operation met a value; activations are never changed in place."""


class IndexingError(TracelensError, TypeError):
    """The thing between the brackets is not an index."""


class UnsupportedFunctionError(TracelensError, TypeError):
    """The function is not one that a graph can hold."""


class RandomFunctionError(TracelensError):
    """A random function was applied to a value."""


class DynamicShapeError(TracelensError):
    """The shape of the result would depend on the data."""


class LayerMappingError(TracelensError):
    """Values that are mapped over different layers were combined."""


# --- gradients ---------------------------------------------------------------------------------------------------


class LossError(TracelensError):
    """What was to be differentiated is not one floating number made of sites."""


class GradientTargetError(TracelensError):
    """A gradient was asked for with respect to something that is not a site as it was read."""


class UnusedGradientError(TracelensError):
    """The loss does not depend on the site that a gradient was asked for."""


class NestedGradientError(TracelensError):
    """A gradient was to be taken of something that is made of a gradient."""


class GradientInGenerationError(TracelensError):
    """Gradients inside ``model.generate`` are not possible."""


class UndifferentiableModelError(TracelensError):
    """The model is in a state in which its forward pass cannot be differentiated."""


# --- positions and sizes -----------------------------------------------------------------------------------------


class PositionAxisError(TracelensError):
    """A function indexes, reduces or mixes positions where the rows' positions do not line up."""


class RaggedSelectionError(TracelensError):
    """Rows select different numbers of tokens, so the result has no shape."""


class TokenRangeError(TracelensError, IndexError):
    """A token selector points outside the prompt, or selects nothing."""


class TokenMatchError(TracelensError):
    """A text selector matches no token span of a row, or more than one."""


class SymbolicSizeError(TracelensError, TypeError):
    """A size was needed as a number, but this recording has no prompt, so it is a symbol."""


class SpecialisedGraphError(TracelensError):
    """A compiled program was recorded for other sizes than those of this prompt."""


# --- constants, sweeps and splices ---------------------------------------------------------------------------------


class UnknownConstantError(TracelensError, KeyError):
    """The program has no constant of that name."""

    __str__ = TracelensError.__str__  # KeyError would show the repr of the first argument


class SweepError(TracelensError, ValueError):
    """The values of a sweep do not make points, or its program cannot be swept."""


class RowsMeetError(TracelensError):
    """A batch was to run in slices of rows, and the block lets rows of different slices meet."""


class SpliceError(TracelensError, TypeError):
    """The module cannot be spliced there, or the splice could not change anything."""


# --- prompts -----------------------------------------------------------------------------------------------------


class PromptError(TracelensError):
    """The prompt is not something that can be run."""


class NoTokenizerError(PromptError):
    """Text was given or asked for, and the model has no tokenizer."""


class EmptyPromptError(PromptError):
    """The prompt has no tokens."""


class PromptTooLongError(PromptError):
    """The prompt has more tokens than the model has positions."""


# --- other libraries ---------------------------------------------------------------------------------------------


class BridgeError(TracelensError):
    """A graph cannot be run through the other library."""


# --- results -----------------------------------------------------------------------------------------------------


class UnsavedValueError(TracelensError):
    """The value was not saved, so nothing of it is left."""


class UnknownSaveError(TracelensError, KeyError):
    """Nothing was saved under that name."""

    __str__ = TracelensError.__str__  # KeyError would show the repr of the first argument


class SavedFileError(TracelensError):
    """The file that a result was saved to is no longer the one that the run wrote."""


class PerPromptError(TracelensError, AttributeError, TypeError):
    """What was saved holds one tensor for each prompt, and was used as one tensor, or with other prompts."""


class NotRunYetError(TracelensError):
    """The value is asked for before the block has ended."""


class FailedRunError(TracelensError):
    """The run that should have produced the value failed."""


class GenerationStepError(TracelensError):
    """Generation steps do not fit: a value of a step that was not, or an other pass than a step makes."""


class SaveInGenerationError(TracelensError):
    """Saving inside ``model.generate`` is not possible yet."""


# --- running -----------------------------------------------------------------------------------------------------


class ConstantChangedError(TracelensError):
    """A tensor captured by the graph was changed before the run."""


class OpFailedError(TracelensError):
    """An operation of the graph raised while the model ran."""


class TrainingModeError(TracelensError):
    """The model is in training mode, in which it drops activations at random or changes its own statistics."""


class ExtraMemoryError(TracelensError):
    """A run would hold more memory beside the model than the user allows."""


class ApplyResultError(TracelensError):
    """A function given to ``tl.apply`` returned something else than ``like=`` declares."""


class SiteMismatchError(TracelensError):
    """The tensor that the model produced at a site is not what the site's table says."""


class MutatedActivationError(TracelensError):
    """The model changed a tensor in place after tracelens had read it."""


class ModelClosedError(TracelensError):
    """The model has no weights, or its ranks were closed, so it cannot run."""


# --- ranks -------------------------------------------------------------------------------------------------------


class RankFailedError(TracelensError):
    """A rank raised while it did what it was asked to do.

    ``rank``: which one (the first, if several did). ``kind``: the class of what it raised. ``remote_traceback``: its
    traceback, as text. ``original``: the error itself, if it is one of these. ``alone``: did others do without it?
    """

    rank: int | None = None
    alone: bool = True
    kind: str = ""
    remote_traceback: str = ""
    original: TracelensError | None = None


class RankDiedError(TracelensError):
    """The process of a rank ended.

    ``rank``: which one. ``exit_code``: as :mod:`subprocess` has it, so ``-9`` if signal 9 ended it; ``None`` if it
    cannot be known. ``log``: the end of what it printed.
    """

    rank: int | None = None
    exit_code: int | None = None
    log: str = ""


class RankTimeoutError(TracelensError, TimeoutError):
    """The ranks did not answer within the time limit. ``waiting_for``: those that had not."""

    waiting_for: tuple[int, ...] = ()


class RanksClosedError(TracelensError):
    """The ranks were ended by their owner, or belong to another process."""


class RankMessageError(TracelensError):
    """What was sent between the owner of ranks and a rank is not a message, or cannot be one."""


# --- graphs as data ----------------------------------------------------------------------------------------------


class VerificationError(TracelensError):
    """The graph breaks a rule of the language."""


class GraphSyntaxError(TracelensError):
    """The text is not a graph."""


class GraphFileError(TracelensError):
    """The file is not an intact graph file."""


class GraphVersionError(GraphFileError):
    """The file was written in a newer major version of the format."""


class ForbiddenFunctionError(GraphFileError):
    """The file names a function that is not on the allow-list. It was not executed."""


class UntrustedApplyError(GraphFileError):
    """A graph with ``tl.apply`` runs Python code of its own; files hold it only on request."""


# --- the embedded model ------------------------------------------------------------------------------------------


class EmbeddedModelError(TracelensError):
    """The embedded default model could not be fetched or unpacked."""

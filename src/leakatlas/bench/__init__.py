"""Studies: axes to cells, cells to records, records to ``results/*.json``.

================  =================================================================================
``schema``        what a study file may say
``study``         a study file, checked, and its cases
``cells``         one case, one seed, one batch: what is run and how it is named
``code``          the hash of the code behind a figure
``scene``         the live objects of a cell
``harness``       play, attack, score
``record``        what a cell leaves behind
``lean``          a round of which only the sum is kept
``lanes``         local processes that run cells
``cluster``       the same on Ray
``store``         records on disk
``figures``       from records to the figures of a result file
``examine``       what studies' own files look at in a trial
``secrets``       attacks on the secret of a defense
``meter``         time and memory of a call
``rival``         breaching on a problem of ours
``differential``  our figures beside those of official code
``runner``        a whole study: what is left to do, who does it, what comes of it
================  =================================================================================

Nothing is imported here, so that listing studies does not load torch.
"""

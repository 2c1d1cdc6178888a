"""Where images come from: a folder or prefix of images, of tars in WebDataset's convention, of Parquet tables.

Listing a source yields units one at a time (an image, a tar, a row group); reading some of them yields each image's
bytes, or why it has none, with its labels. Nothing is extracted, no member but the named ones is opened, and no URL
but those below the stated root.
"""

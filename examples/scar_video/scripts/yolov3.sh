#!/bin/sh -e
# Objects in a picture get boxes, and are listed.
case "$INPUT_FILE_PATH" in *.y4m) ;; *) exit 0 ;; esac
name=$(basename "$INPUT_FILE_PATH" .y4m)
darknet detector demo "$INPUT_FILE_PATH" -out_filename "$TMP_OUTPUT_DIR/$name.boxed.y4m" > "$TMP_OUTPUT_DIR/$name.boxes"

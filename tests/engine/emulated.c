/* Runs programs of the kernel that another machine translated: test_other_processors.py writes and reads the numbers.
 *
 * Standard input has, for every program, eight-byte integers and bytes:
 *   bytes of the image, constants, offset of the program, arrays, start, stop
 *   bytes of every array
 *   offsets of the constants in the image
 *   the image; every array
 * Standard output gets the arrays as they are after the call. */

#include <stdio.h>
#include <stdlib.h>

#include "program.h"

static void *fetch(size_t size) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, size + 64) || fread(memory, 1, size, stdin) != size) exit(2);
    return memory;
}

int main(void) {
    for (I head[6]; fread(head, sizeof(I), 6, stdin) == 6;) {
        I *size = fetch((size_t)head[3] * sizeof(I)), *offset = fetch((size_t)head[1] * sizeof(I));
        char *image = fetch((size_t)head[0]);
        void **arrays = calloc((size_t)head[3] + 1, sizeof(void *)), **constants = calloc((size_t)head[1] + 1, sizeof(void *));
        if (!arrays || !constants) return 2;
        for (I i = 0; i < head[1]; i++) constants[i] = image + offset[i];
        for (I i = 0; i < head[3]; i++) arrays[i] = fetch((size_t)size[i]);
        if (hessquik_run((const Program *)(image + head[2]), constants, arrays, head[4], head[5])) return 3;
        for (I i = 0; i < head[3]; i++) {
            if (fwrite(arrays[i], 1, (size_t)size[i], stdout) != (size_t)size[i]) return 4;
            free(arrays[i]);
        }
        free(arrays), free(size), free(offset), free(constants), free(image);
    }
    return 0;
}

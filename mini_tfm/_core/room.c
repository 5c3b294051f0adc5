/* See room.h. */
#include "room.h"

#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { LARGE_PAGE = 2 << 20, BLOCK = 32 << 20, LINE = 64 };

/* At the start of a block; its pieces follow, each behind a line that says which block it is of. */
struct block {
    size_t used, pieces;
};

static struct block *open_block; /* of BLOCK bytes: the one that the next piece is taken from */

static struct block *new_block(size_t bytes) {
    bytes = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    struct block *block = aligned_alloc(LARGE_PAGE, bytes);
    if (!block) return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(block, bytes, MADV_HUGEPAGE); /* refused, the pages are small ones */
#endif
    *block = (struct block){.used = LINE};
    return block;
}

void *mt_take_room(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return NULL;
    const size_t whole = (bytes + LINE - 1) / LINE * LINE + LINE;
    struct block *block = open_block;
    if (whole > BLOCK / 4) {
        block = new_block(LINE + whole);
    } else if (!block || block->used + whole > BLOCK) {
        block = new_block(BLOCK);
        if (block) open_block = block; /* the one before goes with the last of its pieces */
    }
    if (!block) return NULL;
    char *piece = (char *)block + block->used + LINE;
    *(struct block **)(piece - LINE) = block;
    block->used += whole;
    block->pieces++;
    return piece;
}

void mt_give_room_back(void *piece) {
    if (!piece) return;
    struct block *block = *(struct block **)((char *)piece - LINE);
    if (--block->pieces) return;
    if (block == open_block)
        block->used = LINE;
    else
        free(block);
}

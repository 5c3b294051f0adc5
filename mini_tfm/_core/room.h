/* Memory for packed weights, in blocks whose pages Linux is asked to make large ones (2 MB). A step of one row reads every weight once:
 * with pages of 4 KB it waits for their addresses, and for the processor's own fetching ahead, which stops at a page's end. Read by one
 * thread of a Zen 4: 38 MB at 28 and 45 GB/s, 154 MB at 25 and 32.
 *
 * Weights of a few layers share a block, for each alone is smaller than a large page. A block goes when all of its pieces are given
 * back. Callers hold Python's lock. */
#ifndef MINI_TFM_ROOM_H
#define MINI_TFM_ROOM_H

#include <stddef.h>

/* 64-byte aligned, or NULL without memory. */
void *mt_take_room(size_t bytes);
void mt_give_room_back(void *piece);

#endif

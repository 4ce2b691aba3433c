/* Tensors as C sees them: the structures of DLPack 1.x and the functions that torch offers for them. */

#ifndef HESSQUIK_DLPACK_H
#define HESSQUIK_DLPACK_H

#include <stdint.h>

enum { DLPACK_MAJOR = 1, DLPACK_MINOR = 3, DLPACK_CPU = 1, DLPACK_FLOAT = 2 };

typedef struct {
    uint32_t major, minor;
} DlpackVersion;

/* Numbers of `bits` bits at `data` + `offset` bytes; strides count numbers. */
typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t offset;
} DlpackTensor;

/* A tensor with its memory, which `deleter` frees. */
typedef struct DlpackManaged {
    DlpackVersion version;
    void *context;
    void (*deleter)(struct DlpackManaged *self);
    uint64_t flags;
    DlpackTensor tensor;
} DlpackManaged;

/* What the capsule torch.Tensor.__dlpack_c_exchange_api__ points to. The functions return 0, or -1 with an error set;
 * import_tensor takes over the memory, describe does not. */
typedef struct {
    DlpackVersion version;
    void *older;
    int (*allocate)(DlpackTensor *, DlpackManaged **, void *, void (*)(void *, const char *, const char *));
    int (*export_tensor)(void *object, DlpackManaged **managed);
    int (*import_tensor)(DlpackManaged *managed, void **object);
    int (*describe)(void *object, DlpackTensor *tensor);
    int (*stream)(int32_t device_type, int32_t device_id, void **stream);
} DlpackFunctions;

#endif

/* A CUDA driver that answers at once and does nothing: what a launch costs on the host, and what it passes,
   can be seen without a GPU. Built as libcuda.so.1; with STUB_TRACE set it prints every launch. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HANDLE ((void *)0x1000)
enum { NUM_ARGUMENTS = 3, COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76 };

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
} Config;

static int nothing(void) { return 0; }
static int version(int *v) { *v = 13000; return 0; }
static int count(int *n) { *n = 1; return 0; }
static int zero(int *v) { *v = 0; return 0; }
static int name(char *text, int size, int device) { strncpy(text, "stub", size); return 0; }
static int uuid(char *bytes, int device) { memset(bytes, 1, 16); return 0; }
static int context_id(void *context, unsigned long long *id) { *id = 1; return 0; }
static int handle(void **out) { *out = HANDLE; return 0; }
static int handle_second(void *in, void **out) { *out = HANDLE; return 0; }
static int error_text(int error, const char **text) { *text = "stub"; return 0; }

static int attribute(int *value, int which, int device) {
    *value = which == COMPUTE_CAPABILITY_MAJOR ? 9 : which == COMPUTE_CAPABILITY_MINOR ? 0 : 1024;
    return 0;
}

static int launch_config(const Config *config, void *kernel, void **arguments, void **extra) {
    static int tracing = -1;
    if (tracing < 0) tracing = getenv("STUB_TRACE") != NULL;
    if (tracing) {
        printf("launch grid %u block %u stream %p arguments", config->grid[0], config->block[0], config->stream);
        for (int i = 0; i < NUM_ARGUMENTS; i++) printf(" %lld", *(long long *)arguments[i]);
        printf("\n");
        fflush(stdout);
    }
    return 0;
}

static int launch(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *stream, void **arguments, void **extra) {
    Config config = {{gx, gy, gz}, {bx, by, bz}, shared, stream};
    return launch_config(&config, kernel, arguments, extra);
}

static const struct { const char *name; void *function; } KNOWN[] = {
    {"cuDriverGetVersion", version}, {"cuDeviceGetCount", count}, {"cuDeviceGet", zero},
    {"cuDeviceGetAttribute", attribute}, {"cuDeviceGetName", name}, {"cuDeviceGetUuid", uuid},
    {"cuDevicePrimaryCtxRetain", handle}, {"cuCtxGetCurrent", handle}, {"cuCtxGetDevice", zero},
    {"cuCtxGetId", context_id}, {"cuCtxPopCurrent", handle}, {"cuLibraryLoadData", handle},
    {"cuLibraryGetKernel", handle}, {"cuModuleLoadDataEx", handle}, {"cuModuleGetFunction", handle},
    {"cuStreamGetCtx", handle_second}, {"cuStreamCreate", handle}, {"cuKernelGetFunction", handle},
    {"cuKernelGetAttribute", zero}, {"cuFuncGetAttribute", zero}, {"cuGetErrorName", error_text},
    {"cuGetErrorString", error_text}, {"cuLaunchKernel", launch}, {"cuLaunchKernelEx", launch_config},
};

int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    *function = nothing;
    if (!strncmp(symbol, "cuGetProcAddress", strlen("cuGetProcAddress"))) *function = cuGetProcAddress;
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (!strcmp(KNOWN[i].name, symbol)) *function = KNOWN[i].function;
    if (status) *status = 0;
    return 0;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    return cuGetProcAddress(symbol, function, version, flags, status);
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { return version(v); }

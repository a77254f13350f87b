/* NVIDIA's driver as far as kernels are loaded and launched: it writes down what it is asked, and runs nothing.
 *
 * The log is a text, one line for each call that matters. fake_expect names the sizes of the parameters of the next
 * launches, whose bytes are written down; fake_fail lets the function of a name fail. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char log_text[1 << 20];
static size_t used;
static int sizes[64], count;
static char failing[64];
static int failure;
static _Thread_local void *contexts[8];
static _Thread_local int depth;

#define LOG(...) (used += (size_t)snprintf(log_text + used, sizeof log_text - used, __VA_ARGS__))
#define FAIL(name)                      \
    if (strcmp(failing, name) == 0) {   \
        return failure;                 \
    }

const char *fake_log(void) { return log_text; }
void fake_clear(void) { used = 0, log_text[0] = 0; }
void fake_fail(const char *name, int code) { snprintf(failing, sizeof failing, "%s", name), failure = code; }
void fake_expect(const int *of, int n) { memcpy(sizes, of, sizeof *of * (size_t)(count = n)); }

int cuInit(unsigned flags) { FAIL("cuInit") return (int)flags; }
int cuGetErrorString(int error, const char **text) {
    *text = error == 209 ? "no kernel image is available for execution on the device" : "out of order";
    return 0;
}
int cuDeviceGet(int *device, int ordinal) { FAIL("cuDeviceGet") return *device = ordinal + 40, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(uintptr_t)(1000 + device), 0; }
int cuCtxPushCurrent_v2(void *context) { return contexts[++depth] = context, 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = contexts[depth--], 0; }
int cuCtxGetCurrent(void **context) { return *context = contexts[depth], 0; }
int cuCtxSetCurrent(void *context) { return contexts[depth] = context, 0; }

int cuModuleLoadData(void **module, const void *image) {
    FAIL("cuModuleLoadData")
    *module = (void *)(uintptr_t)0x77;
    LOG("load %.4s in %llu\n", (const char *)image, (unsigned long long)(uintptr_t)contexts[depth]);
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    FAIL("cuModuleGetFunction")
    *function = (void *)((uintptr_t)module * 256 + strlen(name));
    LOG("function %s\n", name);
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    FAIL("cuFuncSetAttribute")
    (void)function;
    LOG("attribute %d = %d\n", attribute, value);
    return 0;
}

static int launch(void *function, const unsigned *shape, void *stream, void **parameters) {
    FAIL("cuLaunchKernel")
    LOG("launch %llx grid", (unsigned long long)(uintptr_t)function);
    LOG(" %u %u %u block %u %u %u shared %u", shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]);
    LOG(" stream %llx parameters", (unsigned long long)(uintptr_t)stream);
    for (int i = 0; i < count; i++) {
        LOG(" ");
        for (int byte = 0; byte < sizes[i]; byte++) {
            LOG("%02x", ((unsigned char *)parameters[i])[byte]);
        }
    }
    LOG("\n");
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    unsigned shape[] = {gx, gy, gz, bx, by, bz, shared};
    return extra ? 1 : launch(function, shape, stream, parameters);
}

/* What Triton's own launcher calls beside these; CUlaunchConfig as in cuda.h. */
typedef struct {
    unsigned shape[7];
    void *stream;
    void *attributes;
    unsigned attribute_count;
} Config;
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
    return extra || config->attribute_count ? 1 : launch(function, config->shape, config->stream, parameters);
}
int cuDeviceGetAttribute(int *value, int attribute, int device) { return (void)attribute, (void)device, *value = 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { return (void)attribute, (void)function, *value = 0; }
int cuFuncSetCacheConfig(void *function, int config) { return (void)function, (void)config, 0; }
int cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return (void)limit, *value = 0, 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
    return (void)attribute, *(uint64_t *)data = pointer, 0;
}
int cuDriverGetVersion(int *version) { return *version = 12080, 0; }

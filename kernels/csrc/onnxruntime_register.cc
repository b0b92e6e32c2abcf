// What ONNX Runtime calls when it opens the library: the ops join a session's options.
#include "onnxruntime_node.h"

namespace dsformer {
namespace {

constexpr char kDomain[] = "dsformer";

// The domain is never freed: sessions made with it may outlive any static object.
OrtCustomOpDomain* make_domain(const OrtApi& api) {
  OrtCustomOpDomain* domain = nullptr;
  check(api, api.CreateCustomOpDomain(kDomain, &domain));
  check(api, api.CustomOpDomain_Add(domain, &ds_linear_op()));
  check(api, api.CustomOpDomain_Add(domain, &attention_op()));
  return domain;
}

}  // namespace
}  // namespace dsformer

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {
    // The first slots are as old as the table itself.
    return base->GetApi(1)->CreateStatus(
        ORT_FAIL, "libdsformer.so needs ONNX Runtime 1.17 or newer: install a newer onnxruntime");
  }
  return dsformer::guarded(*api, "registration of dsformer's ops", [&] {
    dsformer::registered_api = api;
    static OrtCustomOpDomain* const domain = dsformer::make_domain(*api);
    dsformer::check(*api, api->AddCustomOpDomain(options, domain));
  });
}

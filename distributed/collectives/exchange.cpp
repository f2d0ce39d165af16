#include "distributed/collectives/exchange.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/accumulate.h>

namespace drrl {

Exchange::Exchange(const Group& group, const std::vector<Message>& messages,
                   const std::vector<at::Tensor>& contents, const at::TensorOptions& options)
    : received_(messages.size()) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(contents.size() == messages.size(), "Exchange: ", contents.size(), " contents for ",
              messages.size(), " messages");
  const auto members = static_cast<size_t>(group.size());
  std::vector<std::vector<at::Tensor>> to(members);        // flat, by destination
  std::vector<std::vector<size_t>> from(members);          // indices of messages, by source
  std::vector<int64_t> sends(members), receives(members);  // elements
  bool travels = false;  // anything at all, between any two: the same everywhere
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    const int64_t elements = c10::multiply_integers(message.shape);
    travels = travels || (message.from != message.to && elements > 0);
    if (message.from == group.rank()) {
      TORCH_CHECK(contents[i].defined() && contents[i].sizes() == at::IntArrayRef(message.shape) &&
                      contents[i].scalar_type() == options.dtype().toScalarType(),
                  "Exchange: message ", i, " should be ", at::IntArrayRef(message.shape), " of ",
                  options.dtype(), ", it is ",
                  contents[i].defined() ? c10::str(contents[i].sizes(), " of ", contents[i].dtype())
                                        : "undefined");
    }
    if (message.from == group.rank() && message.to == group.rank()) {
      received_[i] = contents[i];
    } else if (message.from == group.rank()) {
      to[static_cast<size_t>(message.to)].push_back(contents[i].reshape({-1}));
      sends[static_cast<size_t>(message.to)] += elements;
    } else if (message.to == group.rank()) {
      from[static_cast<size_t>(message.from)].push_back(i);
      receives[static_cast<size_t>(message.from)] += elements;
    }
  }
  std::vector<at::Tensor> flat;
  for (auto& list : to) {
    flat.insert(flat.end(), list.begin(), list.end());
  }
  outgoing_ = flat.empty() ? at::empty({0}, options) : at::cat(flat);
  bytes_sent_ = static_cast<int64_t>(outgoing_.nbytes());
  at::Tensor incoming = at::empty({c10::sum_integers(receives)}, options);
  int64_t offset = 0;
  for (const auto& list : from) {
    for (const size_t i : list) {
      const int64_t elements = c10::multiply_integers(messages[i].shape);
      received_[i] = incoming.narrow(0, offset, elements).view(messages[i].shape);
      offset += elements;
    }
  }
  if (travels) {
    pending_ = group.all_to_all_async(incoming, receives, outgoing_, sends);
  }
}

std::vector<at::Tensor> Exchange::wait() {
  pending_.wait();
  outgoing_.reset();
  return std::move(received_);
}

}  // namespace drrl

#include "distributed/topology/rendezvous.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>

#include <nlohmann/json.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "core/error.h"

namespace drrl {
namespace {

std::string host_name() {
  std::array<char, 256> text{};
  check(ErrorKind::kCommunication, gethostname(text.data(), text.size() - 1) == 0,
        "gethostname failed");
  return text.data();
}

c10::intrusive_ptr<c10d::TCPStore> open_store(const Environment& environment,
                                              const std::string& address, int64_t port, bool server,
                                              std::chrono::milliseconds timeout) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<std::uint16_t>(port);
  options.isServer = server;
  options.waitWorkers = false;
  options.multiTenant = port != 0;  // a second store of this process uses the server of the first
  options.timeout = timeout;
  try {
    return c10::make_intrusive<c10d::TCPStore>(address, options);
  } catch (const c10::Error& error) {
    raise(ErrorKind::kCommunication, "world rank ", environment.world_rank, " cannot ",
          server ? "serve" : "reach", " the store at ", address, ":", port, ": ",
          error.what_without_backtrace());
  }
}

}  // namespace

c10::intrusive_ptr<c10d::Store> make_store(const Environment& environment, const Group& bootstrap,
                                           std::chrono::milliseconds timeout) {
  if (environment.launcher == Launcher::kTorchrun) {
    const bool server = !environment.agent_store && environment.world_rank == 0;
    auto store = open_store(environment, *environment.master_address, *environment.master_port,
                            server, timeout);
    return c10::make_intrusive<c10d::PrefixStore>(
        c10::str("drrl/attempt_", environment.restart_count), std::move(store));
  }

  check(ErrorKind::kUsage, bootstrap.size() == environment.world_size, "the bootstrap group '",
        bootstrap.name(), "' has ", bootstrap.size(), " members in a world of ",
        environment.world_size);
  // "port address", zero-padded.
  std::array<char, 512> endpoint{};
  c10::intrusive_ptr<c10d::TCPStore> store;
  if (environment.world_rank == 0) {
    const std::string address = environment.local_size == environment.world_size
                                    ? "127.0.0.1"
                                    : environment.master_address.value_or(host_name());
    store = open_store(environment, address, /*port=*/0, /*server=*/true, timeout);
    const std::string text = c10::str(store->getPort(), " ", address);
    check(ErrorKind::kUsage, text.size() < endpoint.size(), "the master address '", address,
          "' is too long");
    std::copy(text.begin(), text.end(), endpoint.begin());
  }
  at::Tensor message = at::from_blob(endpoint.data(), {static_cast<int64_t>(endpoint.size())},
                                     at::kByte)
                           .to(bootstrap.message_device());
  bootstrap.broadcast(message);
  if (!store) {
    const at::Tensor received = message.cpu();
    const std::string text(static_cast<const char*>(received.const_data_ptr()));
    const std::size_t space = text.find(' ');
    store = open_store(environment, text.substr(space + 1), std::stoll(text.substr(0, space)),
                       /*server=*/false, timeout);
  }
  // Nobody leaves before all have connected: rank 0 may be about to fail and take the server with
  // it.
  bootstrap.barrier();
  return c10::make_intrusive<c10d::PrefixStore>("drrl", std::move(store));
}

TextExchange exchange_over(const c10::intrusive_ptr<c10d::Store>& store, const std::string& name,
                           const Environment& environment) {
  const auto keys = c10::make_intrusive<c10d::PrefixStore>(name, store);
  const int64_t rank = environment.world_rank, size = environment.world_size;
  const auto guarded = [rank](const auto& talk) {
    try {
      return talk();
    } catch (const c10::Error& error) {
      raise(ErrorKind::kCommunication, "world rank ", rank,
            " waited in vain for the others at the store: ", error.what_without_backtrace());
    }
  };
  guarded([&] {
    const std::string first = keys->compareSet("world size", "", std::to_string(size));
    check(ErrorKind::kUsage, first == std::to_string(size), "WORLD_SIZE=", size,
          " of the process with RANK=", rank, ", but ", first, " of one that came before it");
    check(ErrorKind::kUsage, keys->add(c10::str("of rank ", rank), 1) == 1,
          "two processes have RANK=", rank);
  });
  return [=, round = int64_t{0}](const std::string& mine) mutable {
    const std::string prefix = c10::str("round ", round++, " ");
    return guarded([&] {
      std::vector<std::string> texts;
      if (rank == 0) {
        texts.push_back(mine);
        for (int64_t other = 1; other < size; ++other) {
          texts.push_back(keys->get_to_str(c10::str(prefix, other)));
        }
        keys->set(prefix + "all", nlohmann::json::to_cbor(texts));
      } else {
        keys->set(c10::str(prefix, rank), mine);
        texts = nlohmann::json::from_cbor(keys->get(prefix + "all"))
                    .get<std::vector<std::string>>();
      }
      // Rank 0 may serve the store, and may be about to fail.
      if (keys->add(prefix + "done", 1) == size) {
        keys->set(prefix + "left", "");
      }
      keys->wait({prefix + "left"});
      return texts;
    });
  };
}

}  // namespace drrl

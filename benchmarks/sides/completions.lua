-- Completions of 6.9 KB: 64 system prompts of 6 KB that come again and again, each with another question.
local words = {"the", "fleet", "holds", "every", "prefix", "that", "a", "request", "may", "need", "and", "router", "knows", "it"}
local prompts = {}
local stream = false
local count = 0

local function text(seed, bytes)
  local parts, size, at = {}, 0, seed
  while size < bytes do
    at = (at * 1103515245 + 12345) % 2147483648
    local word = words[at % #words + 1]
    parts[#parts + 1] = word
    size = size + #word + 1
  end
  return table.concat(parts, " ")
end

function init(args)
  stream = args[1] == "stream"
  for number = 1, 64 do
    prompts[number] = text(number, 6000)
  end
end

function request()
  count = count + 1
  local prompt = prompts[(count * 7919) % #prompts + 1] .. " " .. count .. " " .. text(count, 880)
  local body = '{"model": "tiny", "prompt": "' .. prompt .. '", "max_tokens": 8, "stream": ' .. tostring(stream) .. "}"
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, body)
end
